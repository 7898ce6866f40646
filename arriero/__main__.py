"""The command `arriero`, and `python -m arriero`: the command line, which Ctrl-C ends in one line at any time."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def main() -> int:
    """Run the command line; returns the exit code, 130 for Ctrl-C."""
    try:
        from arriero import cli  # here: Ctrl-C may come during the import

        return cli.main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
