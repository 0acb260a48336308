-- Add what one process has noted, unless that is done, or Redis has lost what the process knew.
-- KEYS: seen, epoch, done.  ARGV: place, epoch that the process knows or nothing, epoch to begin
-- with, number of the batch, seconds to keep, most faults, most occurrences of each; then of each
-- fault: fingerprint, how often, microseconds, description, number of occurrences, and of each of
-- these microseconds and text.
-- Returns the epoch; nil if what the process knew is lost.
local call, pcall = redis.call, redis.pcall
local place, known, fresh, number, lasts, most, most_of_each = unpack(ARGV, 1, 7)

-- What is of another kind is not of our making, and stands in the way.
local function clear(key, kind)
  local found = call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then call('UNLINK', key) end
end

clear(KEYS[2], 'string')
local epoch = call('GET', KEYS[2])
if known ~= '' and epoch ~= known then return false end
if #ARGV == 7 then return known end
-- The first write: where it is refused, for want of memory, nothing has changed. It ends with the
-- last of the faults, so that where they are gone it is.
epoch = epoch or fresh
call('SET', KEYS[2], epoch, 'EX', lasts)
clear(KEYS[3], 'string')
if call('GET', KEYS[3]) == number then return epoch end
clear(KEYS[1], 'zset')
local time = call('TIME')
local oldest = (time[1] - lasts) * 1000000 + time[2]
local at = 8
while at <= #ARGV do
  local fault, count, moment, text, each = unpack(ARGV, at, at + 4)
  local facts, newest = place .. 'f:' .. fault, place .. 'n:' .. fault
  at = at + 5
  if tonumber(moment) > oldest then
    clear(facts, 'hash')
    clear(newest, 'zset')
    if type(pcall('HINCRBY', facts, 'count', count)) == 'table' then
      call('HSET', facts, 'count', count)
    end
    call('HSET', facts, 'fault', text)
    for index = at, at + 2 * each - 2, 2 do
      call('ZADD', newest, ARGV[index], ARGV[index + 1])
    end
    call('ZREMRANGEBYRANK', newest, 0, -most_of_each - 1)
    call('EXPIRE', facts, lasts)
    call('EXPIRE', newest, lasts)
    call('ZADD', KEYS[1], 'GT', moment, fault)
  end
  at = at + 2 * each
end
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', oldest))
for _, old in ipairs(call('ZRANGE', KEYS[1], 0, -most - 1)) do
  call('UNLINK', place .. 'f:' .. old, place .. 'n:' .. old)
end
call('ZREMRANGEBYRANK', KEYS[1], 0, -most - 1)
call('EXPIRE', KEYS[1], lasts)
call('SET', KEYS[3], number, 'EX', 86400)
return epoch
