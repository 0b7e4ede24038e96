"""How nodes come to be: as processes of this machine."""
