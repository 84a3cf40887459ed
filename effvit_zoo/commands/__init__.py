"""The commands of `effzoo`, one file each."""
