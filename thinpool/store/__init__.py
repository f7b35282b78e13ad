"""Named pools, volumes, images and containers: the catalogue, its intents, and what mends it."""
