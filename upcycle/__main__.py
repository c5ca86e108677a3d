"""`python -m upcycle`: the command line."""

from upcycle.cli.main import main

if __name__ == "__main__":
    main()
