"""What networks gain that are split over processes."""
