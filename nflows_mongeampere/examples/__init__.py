"""What the scripts in ``examples/`` share, installed so that they find it; no public API."""
