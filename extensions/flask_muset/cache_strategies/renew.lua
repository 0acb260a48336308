-- Let leases last longer.  KEYS: locks.  ARGV: milliseconds, then the token of each.
for index, lock in ipairs(KEYS) do
  if redis.call('GET', lock) == 'L' .. ARGV[index + 1] then
    redis.call('PEXPIRE', lock, ARGV[1])
  end
end
return #KEYS
