"""Sessions at a node: docker engines of members' own, with everything that leads to them."""
