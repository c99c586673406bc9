"""What all experiments share: flags, the loop over pairs, networks, records, results and figures."""
