"""One absl binary for each section of the paper, over typed functions that read no flags."""
