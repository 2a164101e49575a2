"""The soak: a real server under mixed load, kills and bad input for minutes; nothing may be lost, leak or grow."""
