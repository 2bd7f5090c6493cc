"""The server beside its peers, on one machine, in one run: `make bench`. See docs/performance.md."""
