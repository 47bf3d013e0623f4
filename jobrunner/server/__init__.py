"""The server: mutual TLS, roles, and the library behind it.

main       `jobrunnerd`: serve, dev
app        JobServer: listens, keeps count of connections, guards every call, shuts down
tcp        TLS on an accepted connection; http2: what one peer may do on it
auth       who may call what
service    JobService: convert in, call the runner, convert out; health and reflection beside it
"""
