"""Sessions at the gateway: who may have one, which node takes it, what became of it."""
