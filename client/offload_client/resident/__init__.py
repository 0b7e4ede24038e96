"""A helper process that keeps imports and connections warm between builds."""
