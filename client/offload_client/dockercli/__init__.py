"""Docker's own command line: our plugin for it, and how `docker build` comes to use it."""
