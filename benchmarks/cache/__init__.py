"""Cases of the benchmark `cache`: what layers that a team shares cost, and what they save."""
