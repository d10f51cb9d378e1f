"""`python -m fastlora`, the same as the command `fastlora`."""

from .cli import main

if __name__ == "__main__":
    main()
