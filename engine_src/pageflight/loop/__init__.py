"""The step loop, its process, and the front that clients talk to."""
