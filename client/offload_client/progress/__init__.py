"""What a person or a script sees of a build: interactive, plain, as JSON lines, or nothing.

Start at `offload_client.progress.display.make_display`. This module imports nothing, so that the
start of a command pays only for the form of output that it uses.
"""
