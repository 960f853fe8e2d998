"""The service is killed at every point where an effect passes one of its doors, and must lose and double nothing."""
