"""The host matrix: one test body over apps of every framework on real servers, each in a process of its own."""
