"""What a method and a layer kind fulfil, so that each works with every other."""
