"""The demo: `make demo` runs `examples.demo.run`, `make bench` runs `examples.demo.speed`."""
