"""The local page: a web server that shows folders and starts commands, and keeps no state of its own. No torch."""
