"""One build, seen from the client: options, context, transfer, results."""
