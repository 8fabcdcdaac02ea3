"""What `scripts/bench` does: the gateway against bare Starlette and a bare pass-through, on this machine, in one run."""
