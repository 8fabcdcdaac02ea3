"""For tests of hosts and of whoever writes a provider or a store: contract suites, scripted providers, a clock that stands still."""
