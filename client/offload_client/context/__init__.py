"""The build context: ignore rules, scanning, digests."""
