"""`python -m resq` is the command `resq`."""

from resq.cli import main

if __name__ == "__main__":
    main()
