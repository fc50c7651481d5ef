"""Models of this package in other libraries; each module imports one of them, and nothing imports these modules."""
