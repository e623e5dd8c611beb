"""What a training learns, read by the oracle of nano's world: the base, LoRAs of many kinds, the peer."""
