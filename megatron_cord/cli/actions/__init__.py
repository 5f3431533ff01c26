"""What commands do, with everything heavy that it needs."""
