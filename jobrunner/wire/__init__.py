"""The wire: messages of the protocol and what they are in the library's values. Only this package imports betterproto2.

messages   the generated messages, the client's stub and the server's base, under one name
convert    value <-> message, one table each way
status     error <-> gRPC status, one table
codec      the strict check that every message passes before it is parsed
encode     a part of a log as the bytes of its message, made once and shared
"""
