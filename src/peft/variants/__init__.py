"""What a config field puts around any delta, one file each."""
