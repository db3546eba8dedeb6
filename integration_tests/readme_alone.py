"""Runs the README's blocks of Python where nothing but a wheel is installed (`make release-check`).

The text is that of the wheel's metadata, which a package index shows.
"""

import re
import sys
from importlib.metadata import metadata

import nflows_mongeampere


def main():
    if "site-packages" not in nflows_mongeampere.__file__:
        sys.exit(f"expected an installed wheel, got {nflows_mongeampere.__file__}")
    readme = metadata("nflows-mongeampere").get_payload()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    sys.exit(0 if blocks else "the README has no block of Python")


if __name__ == "__main__":
    main()
