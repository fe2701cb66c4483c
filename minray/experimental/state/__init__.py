"""Ray's old home of the state API."""
