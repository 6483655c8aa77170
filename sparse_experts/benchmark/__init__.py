"""Speed: layers against their experts' products, steps against dense twins, decoding."""
