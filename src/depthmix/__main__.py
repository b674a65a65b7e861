"""`python -m depthmix`, and `accelerate launch -m depthmix` on several devices."""

from depthmix.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
