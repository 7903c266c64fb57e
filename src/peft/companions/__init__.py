"""What any method's config can bring along, one file each."""
