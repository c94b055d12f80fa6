"""`python -m rlora_cli`, which is the command `rlora`: for launchers of several processes."""

from . import main


if __name__ == "__main__":
    main()
