"""The parts of the benchmark `context`: what a build context costs on its way to the builder."""
