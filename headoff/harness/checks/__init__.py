"""What engineers ask of a kernel besides numbers: checks that run where they are named (`--check`)."""
