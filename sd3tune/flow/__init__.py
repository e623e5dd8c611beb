"""The rectified-flow objective as pure functions of plain arguments. sigma 0 is data, sigma 1 is noise."""
