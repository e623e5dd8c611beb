"""The process: device, environment, launcher, signals and out-of-memory errors."""
