"""What tests of core and of every model package share."""
