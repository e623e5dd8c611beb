"""Streams: images that are read while training, shard by shard, in an order that follows from seed and position."""
