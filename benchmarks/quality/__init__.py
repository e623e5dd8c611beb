"""Results of trainings, judged by the oracle of nano's world: the base, LoRAs of many kinds, the peer."""
