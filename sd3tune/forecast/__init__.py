"""The forecast of a run: memory, disk space, steps and time, from a rehearsal on the meta device."""
