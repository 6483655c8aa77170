"""Arms x seeds: many runs of one question, trained once each and compared."""
