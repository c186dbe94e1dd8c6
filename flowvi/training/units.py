from flowvi.supports import as_support


def parse_support(support, event_shape):
    s = as_support(support, event_shape)
    return None if s.is_real else s.bounds()
