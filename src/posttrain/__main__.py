"""``python -m posttrain``, and what ``torchrun -m posttrain`` starts: the command."""

from posttrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
