"""Local self-attention in windows with spans: `api` has the public function."""
