"""``python -m rebasin``, the command where no console script is installed."""

from rebasin.command.main import run

if __name__ == "__main__":
    run()
